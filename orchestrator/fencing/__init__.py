"""How the power of a host is read and cut: ClusterLabs' fence agents, as they are installed."""
