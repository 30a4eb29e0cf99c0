"""The paper's tables and figures: their runs as data, planned, run, gone on with, collected."""
