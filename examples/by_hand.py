"""One processor, registered by hand: python examples/by_hand.py

Needs no key and no network. The run goes to MLFLOW_TRACKING_URI or MLflow's local store.
"""

# Comes first because QitOS 0.3 has no qitos.tracing, and python -I and -S skip the start-up line.
from qitos_mlflow import MlflowTraceProcessor  # isort: skip
from qitos.tracing import add_trace_processor

# Stands in for your own agent: a real QitOS agent with a scripted model.
from qitos_mlflow.cli._demo_agent import DeskAgent, ScriptedModel, act, answer, calculate

processor = MlflowTraceProcessor(
    experiment_name="qitos-examples", run_name="by-hand", tags={"env": "dev"}
)
add_trace_processor(processor)

model = ScriptedModel(
    "scripted-small",
    [
        act("The calculator knows.", ("calculate", {"expression": "6*7"})),
        answer("It said so.", "42"),
    ],
)
agent = DeskAgent("answerer", model, [calculate])
result = agent.run(task="What is six times seven?", trace=False, render=False, return_state=True)

print("answer:", result.state.final_result)
print("delivered:", processor.force_flush())
