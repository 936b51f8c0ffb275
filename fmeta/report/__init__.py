"""The page: panels of measured rows as HTML, PNG and plain text."""

from fmeta.report.costs import Point, against_cost
from fmeta.report.figures import Line, bars, curves
from fmeta.report.interpolation import interpolation
from fmeta.report.matrices import heatmap, heatmaps, stream
from fmeta.report.page import write_report
from fmeta.report.progress import averages, over_time
from fmeta.report.rows import Panel, Row, answer, terminal_table
from fmeta.report.style import Picture

__all__ = (
  'Line',
  'Panel',
  'Picture',
  'Point',
  'Row',
  'against_cost',
  'answer',
  'averages',
  'bars',
  'curves',
  'heatmap',
  'heatmaps',
  'interpolation',
  'over_time',
  'stream',
  'terminal_table',
  'write_report',
)
