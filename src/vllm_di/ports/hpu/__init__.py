"""Intel's Gaudi accelerators: flat paged attention in torch's own operators, FusedSDPA."""
