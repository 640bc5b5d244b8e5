"""The stand-in's tools that start agents."""
