"""The web console: what operators look at and click, served beside the API (docs/console.md, ADR 0022).

`mounting` puts it onto the API's application. `guard` stands before all of it: sessions, origins, forms. `live` keeps
what changed, out of the server's copy in memory; `rows`, `charts` and `herd_view` make what is shown out of it, as pure
functions. `actions` is the only way to change something, and asks for the rights each time. `pages` draw.
"""
