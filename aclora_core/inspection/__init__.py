"""Numbers, tables and charts of a LoRA and of a training."""

from .charts.canvas import to_batch
from .charts.contact_sheet import contact_sheet
from .charts.overview import inspection_charts
from .charts.training import training_chart
from .measure import inspect_lora
from .metadata_table import Rows, cut_rows, metadata_table
from .tables import cut_table, file_rows, inspection_csv, inspection_json, inspection_table

__all__ = [
    "Rows",
    "contact_sheet",
    "cut_rows",
    "cut_table",
    "file_rows",
    "inspect_lora",
    "inspection_charts",
    "inspection_csv",
    "inspection_json",
    "inspection_table",
    "metadata_table",
    "to_batch",
    "training_chart",
]
