"""CVMFS repositories at /cvmfs inside a session, without root.

``settings`` says what is wanted, ``client`` what cvmfs2 is told and what its end means (both pure), ``cache`` keeps
node-local files, ``mount`` brings it all up through a namespace's holder.
"""
