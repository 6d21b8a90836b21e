"""The request path: how one request passes the layers around an app, and what a layer may do with it.

     server -> Edge (outermost) -> LayerStack ---------------------------------------------------------+
                | on_request, outermost first:  proxy > request id > access log > metrics > ...        |
                |      returns None: next layer;  returns an ASGI app: that app answers                |
                |      last layer: probes, /metrics and /log-level are served by the management app    |
                v                                                                                      |
              the app, with all of Starlette's and FastAPI's own layers, and those that agents add     |
                --- send --> Exchange.send: on_response_start, innermost first, once per response      |
                |  exception --> on_error of the innermost layer that has one                          |
                |  time-out  --> the app is cancelled, another answer is sent in its place             |
                v                                                                                      |
              finally: on_end, innermost first: status, duration and route are known ------------------+

The life of one request:

1. The server calls the edge, which chooses its stack of layers by the type of the scope.
2. The stack opens an `Exchange`, the state of the request, and the request context, the fields of its log lines.
3. It calls `on_request` of each layer, outermost first. A layer that returns an ASGI app has answered: the layers
   further in never see the request, unless that app calls `exchange.call_inner`.
4. It calls `on_wait` of each layer, which starts the deadline, and then the app.
5. The app sends its response through `Exchange.send`, which calls `on_response_start` of each layer, innermost first,
   adds the headers that layers have put into `exchange.response_headers`, and passes the message to the server.
6. A deadline that expires cancels the app's task and sends its own answer; what the app still sends is dropped.
   A client that disconnects cancels the task without an answer, where the settings or the route say so.
7. An exception ends the call of the app, and one is raised if the app returns in the middle of its response. `on_error`
   of the innermost layer that has it decides: swallow, or raise on. In an edge it is called when the exception has
   passed `Starlette.__call__`, and what agents have patched there.
8. Whatever has happened, `on_end` of each layer is called, innermost first, and the request context is closed.

The five hooks of a `Layer`; each docstring in `layers` says what it may return and raise:

| hook | called | order | may |
|---|---|---|---|
| `on_request` | once, before the app | outermost first | return an app that answers; raise |
| `on_wait` | once, immediately before the app | outermost first | start a time-out |
| `on_response_start` | once, when the response starts | innermost first | change headers; raise |
| `on_error` | once, for an exception of the app | innermost layer only | return True to swallow it |
| `on_end` | once, always | innermost first | read status, duration and route; must not raise |

The rule of order: when a layer answers, layers inside it never see the request. So layers behind the first one that may
answer must not have `on_response_start` or `on_end`: they would finish requests that they have not begun. Another order
is a ConfigurationError where the stack is made. A layer that overrides `on_request` counts as one that may answer
unless it sets `may_answer = False`.

A layer inside of another one of its class, added to an app with an edge or to a mounted app, says in `Layer.inside`
what works in its place: itself, nothing, or a layer that makes its settings win. It joins the exchange that it finds,
or opens one of its own in a mounted app, behind a copied scope, or to cancel the app. Exchanges of one request share
the context of the log and the headers of the response.

The modules: `layers` (Layer, LayerStack), `hooks` (the hooks of several layers as lists), `exchange` (the state of one
request), `edge` (the outermost place), `management` (probes and their like, which the edge has served), `interruption`
(answer in place of an app that is cancelled), `cancellation` (which exchange may be cancelled, and whether it was),
`in_flight` (the requests that are left when the process ends), `stream` (what has been sent of a response in parts),
`listener` (notice that a client disconnects), `timers` (one timer for many equal time-outs).

`docs/contributing/request-path.md` says more, and ends with a layer and its test.
"""
