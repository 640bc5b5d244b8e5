"""Runs actions: some at once, some under a time limit, on threads that inherit no context."""

import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

from qitos.core import ActionResult, ActionStatus


class _Tracker:
    def enter(self):
        pass

    def exit(self):
        pass


class ActionExecutor:
    def __init__(self, tool_registry, engine=None):
        self.tool_registry = tool_registry
        self._engine = engine

    def execute(self, actions, env=None, state=None):
        results = {}
        together = [a for a in actions if a.name in self.tool_registry.parallel]
        if len(together) > 1:
            tracker = _Tracker()
            with ThreadPoolExecutor(max_workers=4) as pool:
                futures = [
                    (a, pool.submit(self._execute_one, a, env, state, tracker, segment_index=1))
                    for a in together
                ]
                results.update({id(a): future.result() for a, future in futures})
        for action in actions:
            if id(action) not in results:
                results[id(action)] = self._execute_one(action, env=env, state=state)
        return [results[id(action)] for action in actions]

    def _execute_one(self, action, env=None, state=None, tracker=None, segment_index=0):
        start = time.monotonic()
        limit = action.timeout_s or self.tool_registry.limits.get(action.name)
        self._dispatch("on_before_tool_use", action)
        try:
            if limit is None:
                output = self._call_tool(None, action.name, action.args, runtime_context=None)
            else:
                pool = ThreadPoolExecutor(max_workers=1)
                try:
                    output = pool.submit(
                        self._call_tool, None, action.name, action.args, runtime_context=None
                    ).result(timeout=limit)
                finally:
                    pool.shutdown(wait=False)
        except FutureTimeout:
            return self._result(action, ActionStatus.TIMED_OUT, start, error="too slow")
        except Exception as exc:
            if type(exc).__name__ == "EngineInterrupt":
                raise
            return self._result(action, ActionStatus.ERROR, start, error=str(exc))
        self._dispatch("on_after_tool_use", action)
        return self._result(action, ActionStatus.SUCCESS, start, output=output)

    def _call_tool(self, tool, name, args, runtime_context):
        return self.tool_registry.get(name)(**args)

    def _result(self, action, status, start, output=None, error=None):
        category = None if status is ActionStatus.SUCCESS else f"{status.value}_category"
        return ActionResult(
            action.name,
            status,
            output,
            error,
            action.action_id,
            latency_ms=(time.monotonic() - start) * 1000,
            metadata={"error_category": category, "started": True, "segment_index": 0},
        )

    def _dispatch(self, name, action):
        for hook in self._engine.hooks if self._engine is not None else ():
            method = getattr(hook, name, None)
            if method is not None:
                method(action, self._engine)
