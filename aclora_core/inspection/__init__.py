"""Numbers, tables and charts of a LoRA and of a training."""

from .charts import inspection_charts, overview_chart
from .charts.canvas import to_batch
from .charts.contact_sheet import cell_side, contact_sheet, extend
from .charts.step_sheet import SheetRow, step_sheet
from .charts.training import training_chart
from .charts.training_picture import training_picture
from .measure import inspect_lora
from .metadata_table import Rows, metadata_table, reading_rows, truncation_rows
from .tables import inspection_csv, inspection_json, inspection_table, summary_rows, truncation_table

__all__ = [
    "Rows",
    "SheetRow",
    "cell_side",
    "contact_sheet",
    "extend",
    "inspect_lora",
    "inspection_charts",
    "inspection_csv",
    "inspection_json",
    "inspection_table",
    "metadata_table",
    "overview_chart",
    "reading_rows",
    "step_sheet",
    "summary_rows",
    "to_batch",
    "training_chart",
    "training_picture",
    "truncation_rows",
    "truncation_table",
]
