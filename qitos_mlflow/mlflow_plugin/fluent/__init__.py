"""MLflow's fluent API on the agent's thread: the active run, spans below ours, what is around.

Every step here may fail without consequence for the agent, and none imports mlflow.
"""
