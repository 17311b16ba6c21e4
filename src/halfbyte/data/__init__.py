"""Data: from a file to the tokens of a batch, with nothing lost and nothing guessed in silence.

options   what can be asked
reading   files, folders and Hub data sets -> records, each with its file and line
rows      records -> checked rows, by the format that `detection` finds
templates conversations -> text, and which of it is the assistant's
examples  rows -> token ids and the mask of supervised tokens; the prompt at inference
packing   examples -> batches without padding, updates -> micro-batches
sampler   the order of rows, a function of seed and epoch
prepare   all of it, held-out rows and the audit included; `check` shows it
"""

from halfbyte.data.audit import Audit
from halfbyte.data.check import render_check
from halfbyte.data.encoding import Encoder
from halfbyte.data.examples import Example, LabelChoice, render_prompt
from halfbyte.data.options import DataOptions, DataSource
from halfbyte.data.packing import collate, plan_micro_batches
from halfbyte.data.prepare import Prepared, load_rows, prepare
from halfbyte.data.records import BadRow, Origin
from halfbyte.data.sampler import Sampler
from halfbyte.data.templates import ChatTemplate, resolve_template, stop_ids

__all__ = [
    "Audit",
    "BadRow",
    "ChatTemplate",
    "DataOptions",
    "DataSource",
    "Encoder",
    "Example",
    "LabelChoice",
    "Origin",
    "Prepared",
    "Sampler",
    "collate",
    "load_rows",
    "plan_micro_batches",
    "prepare",
    "render_check",
    "render_prompt",
    "resolve_template",
    "stop_ids",
]
