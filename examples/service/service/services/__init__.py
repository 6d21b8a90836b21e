"""What the service does, without HTTP: functions of a session, which routers call."""
