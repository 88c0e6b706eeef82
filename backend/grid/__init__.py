"""A grid over one or two fields of a request: painted cell by cell, kept, drawn as one sheet."""

from backend.grid.axes import Axis, Field, fields
from backend.grid.cells import Cell, Grid
from backend.grid.kept import Unfinished, forget, unfinished
from backend.grid.painting import paint

__all__ = ["Axis", "Cell", "Field", "Grid", "Unfinished", "fields", "forget", "paint", "unfinished"]
