"""MLflow's own style, one call for every agent: python examples/autolog_example.py

Needs no key and no network. The runs go to MLFLOW_TRACKING_URI or MLflow's local store. They are
delivered in the background, the last ones when the process ends.
"""

import qitos_mlflow

# Stands in for your own agent: a real QitOS agent with a scripted model.
from qitos_mlflow.cli._demo_agent import DeskAgent, ScriptedModel, answer


def greet(name: str) -> str:
    """Ask a fresh agent to greet someone."""
    model = ScriptedModel("scripted-small", [answer("Be polite.", f"Good day, {name}.")])
    agent = DeskAgent("greeter", model, [])
    result = agent.run(task=f"Greet {name}.", trace=False, render=False, return_state=True)
    return str(result.state.final_result)


qitos_mlflow.autolog(experiment_name="qitos-examples", tags={"example": "autolog"})
print(greet("Ada"))
print(greet("Grace"))

qitos_mlflow.autolog(disable=True)
print(greet("nobody who is logged"))
