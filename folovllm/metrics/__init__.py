"""What the server counts: numbers of the engine and of HTTP, a Prometheus page of them, and a line in the log.

Milestone: M8. vLLM counterpart: vllm/v1/metrics. With several engines (M10), replicas.py sorts the numbers by engine.

    AsyncLLM --on_step--> EngineMetrics --> prometheus.py: the text of GET /metrics, with vLLM's names
                     \\--> ThroughputLog: a line every ten seconds while there is work
"""
