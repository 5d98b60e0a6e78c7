"""Ray nodes on plain machines: the file that names them, starting and ending one on each, reaching them."""
