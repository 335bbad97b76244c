"""The data pipeline, in the order that data flows; each stage's output type in brackets.

1. `files.py`     a path, glob, URL or hub name -> files; open, retry                      [paths and `FileFacts`]
2. `formats.py`   one file -> its chunks; one chunk -> texts or token ids                  [`Chunk`, `Content`]
   `arrow.py`     the same of arrow files; `sniff.py` says what a file holds, `convert.py` copies what cannot be read
                  in parts, and `columns.py` says which column or key was meant
3. `source.py`    all files -> documents with an index                                     [`Source`]
4. `hold_out.py`  finds copies of the held-out documents                                   [`HoldOutFilter`]
5. `packing.py`   documents -> token ids with EOS between -> fixed blocks                  [`Document`, `Row`]
6. `lanes.py`     chunks -> lanes: skip, hold-out, shuffle, endless passes                 [`Split`, `Document`]
7. `stream.py`    lanes -> the canonical order of rows, split over ranks and workers       [`RowStream`]
8. `collator.py`  rows -> one micro-batch of tensors                                       [dict of tensors]
9. `loader.py`    the loader that Trainer reads; owns the position in the stream           [`BatchLoader`]

A stage imports only earlier stages. `fitting.py` chooses hold-out and lanes for a source. `pipeline.py` builds them
from a configuration; `token_cache.py` writes a source's token ids to files that replace it; `docstrings.py` builds the
corpus that comes with the recipe; `estimate.py` says how many tokens a pass has, about.
"""
