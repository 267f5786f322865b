"""Where it is computed: mesh, logical-axis rules, collectives, multi-host start-up."""
