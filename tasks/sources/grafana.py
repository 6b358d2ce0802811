"""What Grafana's alerting sends to a webhook contact point, as events.

Pure. The one rule: its alerts have the shape of Alertmanager's, so they are read as those are; the
folder of the rule is the resource where no label names a service.
"""

from tasks.sources.alertmanager import alerts_of
from tasks.sources.event import Delivery, SourceEvent
from tasks.sources.generic import told


def events(delivery: Delivery) -> list[SourceEvent]:
    """One event for each alert; one for what is no group of alerts, such as a custom payload."""
    found = alerts_of(delivery.body)
    return found or [told(delivery.body, "alert.updated")]
