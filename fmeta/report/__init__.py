"""The page: panels of measured rows as HTML, PNG and plain text."""

from fmeta.report.figures import Line, bars, curves
from fmeta.report.interpolation import interpolation
from fmeta.report.matrices import heatmap, stream
from fmeta.report.page import write_report
from fmeta.report.rows import Panel, Row, answer, terminal_table
from fmeta.report.style import Picture

__all__ = (
  'Line',
  'Panel',
  'Picture',
  'Row',
  'answer',
  'bars',
  'curves',
  'heatmap',
  'interpolation',
  'stream',
  'terminal_table',
  'write_report',
)
