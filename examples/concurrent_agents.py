"""Many agents at once, one processor: python examples/concurrent_agents.py

16 agents in 8 threads become 16 runs. No run has data of another agent. Needs no key and no
network. The runs go to MLFLOW_TRACKING_URI or MLflow's local store.
"""

from concurrent.futures import ThreadPoolExecutor

from qitos_mlflow import MlflowTraceProcessor

# Stands in for your own agent: a real QitOS agent with a scripted model.
from qitos_mlflow.cli._demo_agent import DeskAgent, ScriptedModel, act, answer, calculate
from qitos_mlflow.tracing import add_trace_processor

THREADS, AGENTS = 8, 16


def square(number: int) -> str:
    """Square the number with a new agent."""
    call = ("calculate", {"expression": f"{number}*{number}"})
    model = ScriptedModel(
        "scripted-small", [act("Multiply.", call), answer("Done.", f"{number**2}")]
    )
    agent = DeskAgent(f"squarer-{number:02}", model, [calculate])
    task = f"What is {number} squared?"
    return str(
        agent.run(task=task, trace=False, render=False, return_state=True).state.final_result
    )


processor = MlflowTraceProcessor(experiment_name="qitos-examples", tags={"example": "concurrent"})
add_trace_processor(processor)
with ThreadPoolExecutor(THREADS) as pool:
    print(*pool.map(square, range(AGENTS)))
print("delivered:", processor.force_flush())
