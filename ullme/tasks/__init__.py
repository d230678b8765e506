"""House evaluation tasks: one file per kind, each with one public `Task`."""
