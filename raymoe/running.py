"""Which applications run on the Ray cluster that this process has joined."""

from raymoe.errors import StartError


def the_application() -> str:
    """The one application that runs on this Ray cluster. Raises StartError where there are none or several."""
    import ray

    from raymoe.actors.names import NAMESPACE, placement_name

    head, tail = placement_name("\0").split("\0")
    names = [item["name"] for item in ray.util.list_named_actors(all_namespaces=True) if item["namespace"] == NAMESPACE]
    running = sorted(name[len(head) : -len(tail)] for name in names if name.startswith(head) and name.endswith(tail))
    if not running:
        raise StartError("a Ray cluster runs here, but no application of raymoe; start one with: raymoe serve CONFIG")
    if len(running) > 1:
        raise StartError(f"several applications run: {', '.join(running)}; choose one with --name")
    return running[0]
