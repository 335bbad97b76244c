"""The data pipeline, in the order that data flows; each stage's output type in brackets.

1. `source.py`   a path, glob, URL or hub name -> chunks of documents, each with its index   [`Source` of `Chunk`]
2. `stream.py`   chunks -> lanes: skip, hold-out, shuffle, endless passes                     [`Document`]
3. `packing.py`  documents -> token ids with EOS between -> fixed blocks                      [`Row`]
4. `stream.py`   lanes -> the canonical order of rows, split over ranks and workers           [`RowStream`]
5. `collator.py` rows -> one micro-batch of tensors                                           [dict of tensors]
6. `loader.py`   all of it behind the loader that Trainer reads; owns the position            [`BatchLoader`]

A stage imports only earlier stages. `pipeline.py` builds all six from a configuration; `docstrings.py` builds the
corpus that comes with the recipe.
"""
