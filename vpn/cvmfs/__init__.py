"""CVMFS repositories at /cvmfs inside a session, without root.

``settings`` says what is wanted, ``client`` what cvmfs2 is told and what its end means (both pure), ``cache`` keeps
node-local files, ``log`` reads what cvmfs2 writes (pure), ``servers`` watches that it lives, ``mount`` brings it all up
through a namespace's holder.
"""
