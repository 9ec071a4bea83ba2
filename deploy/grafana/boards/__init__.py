"""The dashboards, each described once: a list of panels, because Grafana's JSON says everything forty times."""
