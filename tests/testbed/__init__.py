"""A cluster of several hosts on one Linux machine: network namespaces, an emulated network, one Ray node on each."""
