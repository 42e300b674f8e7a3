"""One page on what quantizations of a model cost and bring: memory, speed and accuracy."""

from qjax.report.measure import ModelRow, Report, report
from qjax.report.page import table

__all__ = ["ModelRow", "Report", "report", "table"]
