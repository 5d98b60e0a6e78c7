"""Checks of the manifests in k8s/: rendered as they would be applied, then held against schemas and each other."""
