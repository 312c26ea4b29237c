"""The page at `/`: a chat that shows its speed, and the engine while it works.

Milestone: M8. vLLM counterpart: none.

    routes.py   `/`, the files of the page, and `/live`, the stream of what every step decided
    page.html   the page
    chat.js     the conversation; answer.js: one streamed answer and its speed
    live.js     queues, block pool, the last steps; client.js: how both talk to the server
    style.css   on top of the trace viewer's style, from which the page takes its colours

The drawing is the trace viewer's: folovllm/trace/viewer/{model,draw,why,colours}.js. No file comes from another host.
"""
