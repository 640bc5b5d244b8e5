"""Stand-ins that tests share, one of each kind. Whatever can be real in a test is real.

clock        time that passes when the test says so
recorder     a processor that keeps what it receives, and one that always raises
sink         a server in this process, with the sinks that deliver to it (delivery)
requester    one HTTP request and its answer (mlflow_plugin/server)
transport    MLflow's calls, kept in memory (mlflow_plugin/sink)
"""
