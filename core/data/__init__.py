"""What a site holds, from a folder of scans to batches of views.

``manifest`` is the table of a site's scans and of what is wrong with it; ``bids`` reads a folder into a manifest;
``volumes`` decodes each scan once into a memory-mapped cache on one grid; ``site`` lays the rows of the table beside the
volumes; ``sampling`` says which scans make a batch, and ``views`` makes two augmented views of it.
"""
