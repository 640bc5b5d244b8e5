"""Several agents at once."""

from concurrent.futures import ThreadPoolExecutor

from qitos.engine.engine import Engine


def fan_out(agents):
    with ThreadPoolExecutor(max_workers=4) as pool:
        futures = [pool.submit(Engine(agent).run, f"part {n}") for n, agent in enumerate(agents)]
        return [future.result().state.final_result for future in futures]
