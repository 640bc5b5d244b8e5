"""A critic's verdict; one without a score gets 1.0, as on later hosts."""

from dataclasses import dataclass


@dataclass
class CriticResult:
    action: str = "continue"
    reason: str = ""
    score: float = 1.0

    @classmethod
    def from_dict(cls, d):
        return cls(d.get("action", "continue"), d.get("reason", ""), float(d.get("score", 1.0)))
