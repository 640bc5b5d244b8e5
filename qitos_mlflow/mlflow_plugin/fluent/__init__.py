"""MLflow's fluent API on the agent's thread: the active run, and MLflow's own spans below ours.

Every step here may fail without consequence for the agent, and none imports mlflow.
"""
