"""An agent in the background: the tool returns before it ends."""

from concurrent.futures import ThreadPoolExecutor

from qitos.engine.engine import Engine


class BackgroundAgent:
    def __init__(self):
        self.future = None

    def start(self, agent):
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.future = self.pool.submit(Engine(agent).run, "background")
        return "started"
