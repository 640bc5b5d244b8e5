"""What is distributed: the wheel, its start-up files, and what an import costs."""
