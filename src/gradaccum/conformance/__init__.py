"""Any trainer against the whole batch in float64: the yardstick behind ``gradaccum conformance``."""

from gradaccum.conformance.oracle import error_of, whole_batch
from gradaccum.conformance.scenarios import Adapter, AdapterError, NotOffered, Scenario, Trained
from gradaccum.conformance.suite import scenario, scenarios
from gradaccum.conformance.verdicts import Trainer, Verdict, judge, judge_all

__all__ = [
    "Adapter",
    "AdapterError",
    "NotOffered",
    "Scenario",
    "Trained",
    "Trainer",
    "Verdict",
    "error_of",
    "judge",
    "judge_all",
    "scenario",
    "scenarios",
    "whole_batch",
]
