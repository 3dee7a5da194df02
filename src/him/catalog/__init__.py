"""History: the commit log as authority, snapshots, branches and the durable commit."""
