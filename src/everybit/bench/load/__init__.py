"""What is sent and when: arrivals, lengths, texts and traces, joined to a workload.

All of it is drawn from one seed before the run: a slow server delays no intended send, and a session is the same
whichever worker process makes it.
"""
