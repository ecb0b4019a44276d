"""Workers that run the tasks of a search: threads, processes or a Dask cluster."""
