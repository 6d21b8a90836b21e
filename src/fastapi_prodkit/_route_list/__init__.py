"""The routes of an app, and who may call each: for `fastapi-prodkit routes` and `testing.assert_routes_locked`.

    app -> listing: each route > access (its rule), limits (rate limit, deadline, body), source -> ListedRoute
        -> lock: the lines of routes.lock -> difference: what has changed, in words

Nothing is decided here. The guard's `rule_of` tells the rule of a route, and the layers and dependencies tell its
limits, so that the list says what happens to a request. Listing an app reads its routes, and changes nothing.
"""
