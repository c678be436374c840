"""The status port: metrics, health, and HAProxy's agent-check, about a service and not for its clients.

Imported by who asks for it only.
"""
