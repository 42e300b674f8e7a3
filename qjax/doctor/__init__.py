"""What is on this machine, which kernels it gets, and what commonly goes wrong, with what to do."""

from qjax.doctor.examination import Examination, examine
from qjax.doctor.finding import Finding, Surroundings, here

__all__ = ["Examination", "Finding", "Surroundings", "examine", "here"]
