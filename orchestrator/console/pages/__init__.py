"""The console's pages, drawn with NiceGUI. What they show is made by `rows`, `herd_view` and `charts`."""
