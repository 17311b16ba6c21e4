"""Report to document: which sections there are, in the order in which somebody decides."""

from halfbyte.compare.page import costs, curves, overview, quality, record
from halfbyte.compare.page.document import Document
from halfbyte.compare.page.view import View
from halfbyte.compare.schema import Report


def document(report: Report) -> Document:
    """Everything the pages say. A section stays where there is nothing for it, and says so."""
    view = View(report)
    sections = [
        overview.side_by_side(view),
        costs.memory(view),
        costs.speed(view),
        curves.curves(view),
        quality.convergence(view),
        quality.pareto(view),
        quality.differences(view),
        costs.predicted(view),
        record.cells(view),
        record.commands(view),
        record.conditions(view),
        record.remarks(view),
    ]
    return Document(report.title, report.sentence, overview.facts(view), sections, report.created)
