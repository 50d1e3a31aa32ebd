"""From run directories to the paper's figures and table: `python -m plotting.all`, or one module an
item.
"""
