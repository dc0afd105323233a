"""The tables and charts of the READMEs, from rows on disk: `python -m bench.report`."""
