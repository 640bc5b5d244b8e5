"""One call to MLflow: its REST and OTLP endpoints over http(s), or MLflow's own client."""
