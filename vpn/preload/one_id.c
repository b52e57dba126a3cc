/* A server that drops privileges runs in a user namespace that has one id.
 *
 * Why: without root a user namespace maps one user and one group, and setgroups(2) is denied in it for good
 * (user_namespaces(7)). ocserv, run as the namespace's root and told to stay it, still calls setgroups and gives up when it
 * fails. There are no groups to drop here, so setgroups and initgroups succeed without acting. setuid, setgid and
 * everything else are left alone: to stay root is allowed, and any other id must fail.
 */
#define _GNU_SOURCE
#include <grp.h>
#include <sys/types.h>

int setgroups(size_t count, const gid_t *groups)
{
	(void)count;
	(void)groups;
	return 0;
}

int initgroups(const char *user, gid_t group)
{
	(void)user;
	(void)group;
	return 0;
}
