"""The route index: which routes can match a path, in the order of FastAPI's router, without asking all of them.

FastAPI's router asks every route in turn whether it matches, those of included routers twice. The index asks only the
routes that can match, in the same order, and then does what the router does with the one that is found:

    path_tree           the tree of path segments: a path in, the routes that can match it out
    fastapi_routes      the routes of a router in the tree; the only module that reads private parts of FastAPI
    index               one request: find its route and hand it over
    ahead               what will serve a request, for those that ask before the router is called
    trial               serve a few requests both ways, before the index is trusted with this version of FastAPI
    requested_template  the route that a refused request was for
"""
