"""The request path: how one request passes the layers around an app, and what a layer may do with it.

     server -> Edge (outermost) -> LayerStack ---------------------------------------------------------+
                | on_request, outermost first:  proxy > request id > access log > metrics > ...        |
                |      returns None: next layer;  returns an ASGI app: that app answers                |
                |      behind the last: the management app serves probes, /metrics and /log-level      |
                v                                                                                      |
              the app, with all of Starlette's and FastAPI's own layers, and those that agents add     |
                --- send --> Exchange.send: on_response_start, innermost first, once per response      |
                |  exception --> on_error of the innermost layer that has one                          |
                |  time-out  --> the app is cancelled, another answer is sent in its place             |
                v                                                                                      |
              finally: on_end, innermost first: status, duration and route are known ------------------+

The life of one request:

1. The server calls the edge, which chooses its stack of layers by the type of the scope.
2. The stack creates an `Exchange`, the state of the request, and the request context, the fields of its log lines.
3. It calls `on_request` of each layer, outermost first. A layer that returns an ASGI app has answered: the layers
   further in never see the request, unless that app calls `exchange.call_inner`.
4. It calls `on_wait` of each layer, where a deadline starts, and then calls the app.
5. The app sends its response through `Exchange.send`, which calls `on_response_start` of each layer, innermost first,
   adds the headers that layers have put into `exchange.response_headers`, and passes the message to the server.
6. A deadline that expires cancels the app's task and sends its own answer; what the app still sends is dropped.
   A client that disconnects cancels the task without an answer, where the settings or the route say so.
7. If the app raises, or returns before its response is complete, `on_error` of the innermost layer that has it is
   called, and decides whether the exception is swallowed. In an edge, `on_error` is called after the exception has
   left `Starlette.__call__`, so that agents that patch this method see the exception.
8. In every case `on_end` of each layer is called, innermost first, and the request context is closed.

The five hooks of a `Layer`; each docstring in `layers` says what it may return and raise:

| hook | called | order | may |
|---|---|---|---|
| `on_request` | once, before the app | outermost first | return an app that answers; raise |
| `on_wait` | once, immediately before the app | outermost first | start a time-out |
| `on_response_start` | once, when the response starts | innermost first | change headers; raise |
| `on_error` | once, for an exception of the app | innermost layer only | return True to swallow the exception |
| `on_end` | once, always | innermost first | read status, duration and route; must not raise |

The rule of order: when a layer answers, layers inside it never see the request. So layers behind the first one that may
answer must not have `on_response_start` or `on_end`: these would be called for requests that the layer has not seen.
Another order is a ConfigurationError when the stack is created. A layer that overrides `on_request` counts as one that
may answer unless it sets `may_answer = False`.

Two layers of one class may surround an app: one in the edge, the other added to the app or to a mounted app. Then
`Layer.inside` of the inner layer returns what is used in its place: itself, None, or a layer that makes its settings
win. A layer below an open exchange joins this exchange. It opens its own exchange in a mounted app, below a copied
scope, or if it may cancel the app. All exchanges of one request share the request context and the response headers.

The modules: `layers` (Layer, LayerStack), `hooks` (the hooks of several layers as lists), `exchange` (the state of one
request), `edge` (the outermost layers), `management` (serve probes and other management routes), `interruption`
(answer in place of an app that is cancelled), `cancellation` (which exchange may be cancelled, and whether it was),
`in_flight` (the requests that are in progress when the process ends), `stream` (bytes and times of a streamed
response), `listener` (detect that a client disconnects), `timers` (one timer for many equal time-outs).

`docs/contributing/request-path.md` says more, and ends with a layer and its test.
"""
