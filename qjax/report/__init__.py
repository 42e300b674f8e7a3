"""One page on what quantizations of a model cost and bring: memory, speed and accuracy."""

from qjax.report.measure import report
from qjax.report.methods import METHODS, Method
from qjax.report.page import table
from qjax.report.rows import ModelRow, Report

__all__ = ["METHODS", "Method", "ModelRow", "Report", "report", "table"]
